"""Golden data of the public PyTorch code, and the runner that compares this code base with a folder of it.

`python -m tests.golden DIR` runs every case of DIR's manifest; see README.md beside this file for what they hold.
"""
