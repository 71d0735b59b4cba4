"""The GPU side of trtseg but for the network library: kernels, device, and the chain of steps."""
