"""How many visual tokens stay (budget), where they leave (cut), how they are ranked (methods), and which they are (select)."""
