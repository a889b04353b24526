"""`bifrost doctor`: what a machine has of what training needs, what is missing, and what to do about it."""
