"""Code that the MMDetection and MMSegmentation plugins share because both hosts are built on mmengine."""
