"""What is measured of finished samples: sets, feature spaces, statistics, pictures, rows."""
