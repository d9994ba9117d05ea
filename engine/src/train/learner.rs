//! What the loop can train: parameters in one or several stores, and the loss of a step.

use super::batches::Examples;
use super::sites::site_loss;
use super::teacher::{Teacher, Terms};
use super::trainer::LoopSettings;
use crate::autograd::{Graph, ParamStore, Var};
use crate::error::Result;
use crate::io::datasets::ImageSet;
use crate::models::dit::Dit;
use crate::sample::schedule::Schedule;
use crate::tensor::Device;

/// A step: everything that it draws is a function of its number and the seed.
pub struct Step<'s, D> {
    /// The data set.
    pub data: &'s D,
    /// Numbers of its examples.
    pub chosen: &'s [u32],
    /// Number of the step, from 0.
    pub number: u64,
    /// Settings of the loop.
    pub settings: &'s LoopSettings,
    /// Noise schedule.
    pub schedule: &'s Schedule,
}

/// A model that the loop can train. Names of parameters differ between its stores.
pub trait Learner: Sized {
    /// What steps draw from.
    type Data: Examples;
    /// What adds terms to the loss.
    type Teacher;

    /// Where it computes.
    fn device(&self) -> &Device;

    /// Its parameters.
    fn stores(&self) -> Vec<&ParamStore>;

    /// As [`Learner::stores`], mutable and in the same order.
    fn stores_mut(&mut self) -> Vec<&mut ParamStore>;

    /// The loss of a step, a scalar on the graph, and its parts where it has several.
    ///
    /// # Errors
    /// When a shape does not fit, or memory runs out.
    fn loss<'m>(
        &'m self,
        g: &Graph<'m>,
        step: &Step<'_, Self::Data>,
        teacher: Option<&Self::Teacher>,
    ) -> Result<(Var, Option<Terms>)>;

    /// The same model with stores of its own that share the values: setting one leaves the other as it is.
    ///
    /// # Errors
    /// When memory runs out.
    fn duplicate(&self) -> Result<Self>;
}

impl Learner for Dit {
    type Data = ImageSet;
    type Teacher = Teacher<Dit>;

    fn device(&self) -> &Device {
        Dit::device(self)
    }

    fn stores(&self) -> Vec<&ParamStore> {
        vec![&self.params]
    }

    fn stores_mut(&mut self) -> Vec<&mut ParamStore> {
        vec![&mut self.params]
    }

    fn loss<'m>(
        &'m self,
        g: &Graph<'m>,
        step: &Step<'_, ImageSet>,
        teacher: Option<&Teacher<Dit>>,
    ) -> Result<(Var, Option<Terms>)> {
        site_loss(g, self, step, teacher)
    }

    fn duplicate(&self) -> Result<Dit> {
        // Every parameter is replaced, so none needs memory of its own.
        let mut model = Dit::unset(self.config.clone(), &Device::dry())?;
        model.params = self.params.duplicate();
        Ok(model)
    }
}
