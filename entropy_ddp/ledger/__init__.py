"""The entropy ledger of a whole run: entries of steps that add up."""
