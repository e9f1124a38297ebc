"""Solvers: structured programs in, proposals out. None of them sees a network, none of them is believed."""
