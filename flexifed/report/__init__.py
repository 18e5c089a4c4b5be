"""From rows to what a person reads. Needs pandas; no Ray, no torch."""
