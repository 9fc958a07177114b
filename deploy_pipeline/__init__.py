"""From a zipped workspace to a running application."""
