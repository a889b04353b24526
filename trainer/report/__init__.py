"""Looking at runs from their folders alone: a page of one, and what differs between several."""
