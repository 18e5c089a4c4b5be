"""Clients, the driver and their rounds as plain classes, to run in one process or, one floor up, as Ray actors."""
