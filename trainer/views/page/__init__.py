"""The live page: NiceGUI pages over `RunReader`. Run text is shown by escaped elements only."""
