#![no_main]
suasion_fuzz::target!(suasion_fuzz::Runs);
