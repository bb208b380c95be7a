"""The kernels on this machine, checked and timed by a command; another says how things stand."""
