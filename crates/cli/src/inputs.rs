//! From what the user names to what the libraries take: rows, model folders, weights.

pub mod demo;
pub mod device;
pub mod hub;
pub mod kept;
pub mod loading;
pub mod model;
pub mod opened;
pub mod rows;
pub mod vocabulary;
pub mod weights;
