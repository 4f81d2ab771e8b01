"""Distillation: losses, stages, cached teacher distributions, stored rows, and whole runs."""
