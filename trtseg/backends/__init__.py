"""Engines that run a built network over a volume; each module is the sole importer of its library."""
