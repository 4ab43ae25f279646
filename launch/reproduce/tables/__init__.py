"""Tables of AttMask and SimPool in small: runs over seeds, evaluations, intervals, plots, by one command each."""
