"""What simpler methods make of vectors, be they pixels or features: nearest neighbours and a one-class SVM.

Scores are higher for more normal vectors. Letters: N training vectors, M vectors to score, F their length.
"""

import numpy as np


def one_class_svm(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """Decision values (M,) of scikit-learn's OneClassSVM, RBF kernel, gamma "scale", nu 0.1. (N, F), (M, F)."""
    from sklearn.svm import OneClassSVM

    return OneClassSVM(kernel="rbf", gamma="scale", nu=0.1, cache_size=1000).fit(train).decision_function(test)


def nearest_neighbour(train: np.ndarray, test: np.ndarray, *, k: int = 1) -> np.ndarray:
    """Minus the Euclidean distance (M,) to the k-th nearest of the training vectors (or the last there is)."""
    from sklearn.neighbors import NearestNeighbors

    k = min(k, len(train))
    return -NearestNeighbors(n_neighbors=k, algorithm="brute").fit(train).kneighbors(test)[0][:, -1]
