"""The top-level package; its subpackages are the folders next to this one: bifrost.kernels, bifrost.data, …"""

__version__ = "0.1.0"
"""The single source of the version, which setup.py reads. CHANGELOG.md lists the changes of each version."""
