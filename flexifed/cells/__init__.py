"""A cell from its first round to its last: what it is, writes, and was computed by. Needs hosts, but no Ray."""
