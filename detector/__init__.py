"""A detector of one's own pictures: fitted to normal ones, calibrated, in one file. `detect.py` is its command."""
