"""How many visual tokens stay (budget), how they are ranked (scores), and which ones they are (select)."""
