"""What the pages are made of. No part imports a page."""
