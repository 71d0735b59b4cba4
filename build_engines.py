#!/usr/bin/env python3
"""Freeze and build the networks of a model set: the same as ``trtseg engines build``."""

from __future__ import annotations

import sys

from trtseg.cli import main

if __name__ == "__main__":
    main(["engines", "build", *sys.argv[1:]])
