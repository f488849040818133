"""The host side of a launch: tiles, arguments, descriptors, launchers."""
