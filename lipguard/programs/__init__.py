"""What provers make of a network: feedback form, LipSDP, torus, rewriting. Proposals' views, never trusted."""
