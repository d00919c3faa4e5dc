"""The pages, and what writes measured tables and plots into them."""
