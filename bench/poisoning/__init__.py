"""What colluding devices achieve in real rounds, beside the bound that the clip gives them."""
