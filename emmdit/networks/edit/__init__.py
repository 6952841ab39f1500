"""EDiT and MM-EDiT (arXiv 2503.16726): linear compressed attention, hybrid joint attention, students."""
