"""How the far sides are spoken to: the contract, the one door out, and a folder for each kind."""
