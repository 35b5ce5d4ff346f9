"""What a stage is handed, and what it works with: folder, device, lease, processes, heartbeat, progress, manifests."""
