"""One page of HTML in which features are looked at: hovered over, clicked on, labelled, exported."""

# The page's scripts in the order in which they run, one line each.
SCRIPTS = []
