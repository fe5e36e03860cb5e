"""Pictures: bytes become an upright RGB image, and no header makes a decoder allocate more than the bounds."""
