"""The card of a detector: what it was fitted to, what it promises, what it does not know."""

from detector.calibration import needed
from detector.detector import Detector

_LIMITS = (
    "promises hold for normal pictures that come as those of the calibration did (same part, camera, light);"
    " `score` warns where they no longer do",
    "it finds what looks unusual, harmless or not, and not what looks usual",
    "a defect of a few pixels may vanish where pictures are resized to the network's input",
)


def promise(detector: Detector) -> str:
    """The threshold's promise in words."""
    threshold, known = detector.threshold, detector.config.get("known_defects")
    if known:
        return (
            f"set by {known['defects']} known defects, of which it finds {100 * known['detection_rate']:.3g} %, with"
            f" {100 * known['false_alarm_rate']:.3g} % false alarms among {known['good']} good ones; no promise"
        )
    if detector.config["folds"] == 1:
        return str(threshold)
    most = 100 * min(1, 2 * threshold.expected)
    return (
        f"at most {most:.3g} % false alarms in expectation, from {threshold.count} normal pictures in"
        f" {detector.config['folds']} folds (cross-conformal: twice the rate of one held-out set)"
    )


def promise_lines(detector: Detector) -> list[str]:
    """The threshold, its promise, and what a better one would take."""
    threshold, wanted = detector.threshold, detector.config["false_alarms"]
    lines = [f"threshold {threshold.value:.4f}: {promise(detector)}"]
    if threshold.promised > wanted and "known_defects" not in detector.config:
        more = needed(wanted, threshold.confidence)
        lines.append(
            f"note: --false_alarms {wanted:g} with {100 * threshold.confidence:g} % confidence needs {more} pictures"
            f" held out, here are {threshold.count}; the threshold is at the lowest of their scores"
        )
    return lines


def card(detector: Detector) -> str:
    """Several lines of text."""
    config = detector.config
    normal, reading, scores = config["normal"], config["reading"], detector.calibration
    size = f"{config['image_size']} x {config['image_size']}"
    lines = [
        f"normal: {normal['pictures']} pictures of {normal['source'] or 'memory'}; {normal['fitted']} fitted,"
        f" {len(scores)} held out, {normal['copies']} copies",
        f"method: {' + '.join(config['method'])} on {config['backbone']}",
        *(f"  {chosen}" for chosen in config["chosen"]),
        f"pictures: upright, RGB, resized to {size} pixels (linear, anti-aliased; sides may be stretched),"
        f" at most {reading['max_megapixels']:g} megapixels",
        f"scores of held-out normal pictures: {scores.min():.3f} to {scores.max():.3f}, higher is more normal",
        *promise_lines(detector),
        f"made: {config['made']}, seed {config['seed']}, torch {config['program']['versions']['torch']}, program"
        f" {config['program']['git'] or 'unknown'}",
        f"checksum: {config.get('checksum', 'not saved yet')}",
        "limits:",
        *(f"  - {limit}" for limit in _LIMITS),
    ]
    return "\n".join(lines)
