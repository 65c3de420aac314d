"""Settings of other trainers turned into those of this one. `conversion.convert` is where it begins."""
