"""The LipSDP matrix inequality: its form, its backends, and the evidence that it proves."""
