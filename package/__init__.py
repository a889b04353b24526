"""The top of the installed package; its parts are the folders next to this one: bifrost.kernels, bifrost.data, …"""
