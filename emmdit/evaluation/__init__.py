"""How good the pictures are. No Lightning here; import the measure you need, so that nothing else is loaded."""
