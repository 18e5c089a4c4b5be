"""A cell from its first round to its last: its identity, its files and its provenance. Needs hosts, but not Ray."""
