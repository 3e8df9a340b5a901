"""Integer products behind one dispatch."""
