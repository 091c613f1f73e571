"""One run: its configuration, its step, its loop and its directory.

Read `step.py`, then `loop.py`.
"""
