"""What is special about 64-bit Arm: its dot-product instructions. Kernel templates are those of the CPU backend."""
