"""`bifrost doctor`: checks of a machine against the requirements of training, with remedies."""
