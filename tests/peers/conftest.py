"""Markers of the test cases that geomstats ships."""


def pytest_configure(config):
    for name in ("random", "vec", "shape", "mathprop", "type", "validation"):
        config.addinivalue_line("markers", f"{name}: of geomstats")
