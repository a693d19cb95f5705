"""Arrays in, arrays out: layers, attention, bodies, scout, router, bank, backbone, decoding."""
