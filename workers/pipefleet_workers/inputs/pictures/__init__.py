"""Pictures: bytes become an upright RGB image, and no header can make a decoder allocate more than the bounds."""
