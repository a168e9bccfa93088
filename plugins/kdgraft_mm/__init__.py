"""What the MMDetection and MMSegmentation plugins share because both hosts live on mmengine."""
