#![no_main]
suasion_fuzz::target!(suasion_fuzz::data::Rows);
