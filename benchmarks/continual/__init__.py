"""What is left of one text when others have been learned: rules, levels, and a bank of deltas."""
