"""What drafting pays: acceptance, costs, and the plan of every step."""
