"""Ablations: the trainings and evaluations of a suite, and the table of what they show."""
