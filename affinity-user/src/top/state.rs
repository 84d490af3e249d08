//! The state of the screen: the last sample, rates since the one before, and the results of keys.
//!
//! A pure value: samples, clients and keys are inputs, the output is at most an [`Effect`], and [`super::draw`] only reads it.

use std::{mem, time::Duration};

use super::{
    clients::{ClientRow, Clients, Query},
    input::{Action, Mode},
    list::List,
    rows::{Pair, PodRow, Rates, ServiceRow},
    sample::{Sample, ServiceSample},
    unpin::Target,
};

/// An action of a key outside of this state.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Effect {
    /// Quit.
    Quit,
    /// Unpin; the user has confirmed it.
    Unpin(Target),
}

/// The list that has the cursor on a service's screen.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pane {
    /// Its pods.
    Pods,
    /// Its clients.
    Clients,
}

/// What the screen shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Screen {
    /// All services.
    Services,
    /// One service.
    Service {
        /// Its id.
        id: u32,
        /// The list that has the cursor.
        pane: Pane,
    },
}

/// What is drawn over the lists.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Overlay {
    /// The help.
    Help,
    /// The question whether to unpin.
    Question(Target),
}

/// The message about the result of an operation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Message {
    /// The text.
    pub text: String,
    /// Whether it is an error.
    pub bad: bool,
}

/// The complete state of the screen.
#[derive(Clone, Debug)]
pub struct State {
    pub(super) interval: Duration,
    /// Whether there is a keyboard: then there are a cursor, and a line about keys.
    pub(super) interactive: bool,
    pub(super) sample: Sample,
    before: Option<Sample>,
    pub(super) screen: Screen,
    pub(super) overlay: Option<Overlay>,
    pub(super) typing: bool,
    pub(super) paused: bool,
    pub(super) message: Option<Message>,
    pub(super) services: List<ServiceRow>,
    pub(super) pods: List<PodRow>,
    pub(super) clients: List<ClientRow>,
    pub(super) found: Option<Clients>,
    /// The number of rows in a page of the list with the cursor.
    page: usize,
}

impl State {
    /// An empty state.
    #[must_use]
    pub fn new(interval: Duration, interactive: bool) -> Self {
        Self {
            interval,
            interactive,
            sample: Sample::default(),
            before: None,
            screen: Screen::Services,
            overlay: None,
            typing: false,
            paused: false,
            message: None,
            services: List::default(),
            pods: List::default(),
            clients: List::default(),
            found: None,
            page: 1,
        }
    }

    /// Stores a sample; rates are computed from it and the one before.
    pub fn set_sample(&mut self, sample: Sample) {
        self.before = Some(mem::replace(&mut self.sample, sample)).filter(|before| before.at_ns > 0);
        self.services.set_rows(self.pair().service_rows());
        if let Screen::Service { id, .. } = self.screen
            && !self.sample.services.contains_key(&id)
        {
            let before = self.before.as_ref().and_then(|before| before.services.get(&id));
            let name = before.map_or("the service", |service| &service.name);
            self.say(format!("{name} was removed"), true);
            self.screen = Screen::Services;
        }
        self.set_pods();
    }

    fn pair(&self) -> Pair<'_> {
        Pair { new: &self.sample, old: self.before.as_ref() }
    }

    fn set_pods(&mut self) {
        let rows = self.service().map(|service| self.pair().pod_rows(service));
        self.pods.set_rows(rows.unwrap_or_default());
    }

    /// Stores clients, unless they are the beginning of a pass and the last pass has answered the same query.
    pub fn set_clients(&mut self, clients: &Clients) {
        let answered = self.found.as_ref().is_some_and(|found| found.complete && found.query == clients.query);
        if clients.complete || !answered {
            self.clients.set_rows(clients.rows.clone());
            self.found = Some(clients.clone());
        }
    }

    /// The clients that the screen needs; `None` if it shows no clients.
    #[must_use]
    pub fn query(&self) -> Option<Query> {
        let Screen::Service { id, .. } = self.screen else { return None };
        let (order, reversed) = self.clients.order();
        Some(Query { service: id, filter: self.clients.filter().to_owned(), order, reversed })
    }

    /// Shows a message until the next key.
    pub fn say(&mut self, text: impl Into<String>, bad: bool) {
        self.message = Some(Message { text: text.into(), bad });
    }

    /// Removes an error message after a success.
    pub fn forget_bad_news(&mut self) {
        self.message.take_if(|message| message.bad);
    }

    /// Sets the number of rows that the list with the cursor shows at once.
    pub fn set_page(&mut self, rows: usize) {
        self.page = rows.max(1);
    }

    /// Opens the screen of the service `namespace/name`; false if there is none.
    pub fn open(&mut self, name: &str) -> bool {
        let id = self.sample.services.iter().find(|(_, service)| service.name == name).map(|(&id, _)| id);
        id.inspect(|&id| self.open_service(id)).is_some()
    }

    /// The part of the screen that has the keyboard.
    #[must_use]
    pub fn mode(&self) -> Mode {
        match (&self.overlay, self.typing) {
            (Some(Overlay::Help), _) => Mode::Help,
            (Some(Overlay::Question(_)), _) => Mode::Question,
            (None, true) => Mode::Filter,
            (None, false) => Mode::Lists,
        }
    }

    /// Whether sampling is paused.
    #[must_use]
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// The service of the current screen.
    pub(super) fn service(&self) -> Option<&ServiceSample> {
        let Screen::Service { id, .. } = self.screen else { return None };
        self.sample.services.get(&id)
    }

    /// That service's row.
    pub(super) fn service_row(&self) -> Option<&ServiceRow> {
        let Screen::Service { id, .. } = self.screen else { return None };
        self.services.all().iter().find(|row| row.id == id)
    }

    /// The mean number of pins of a ready pod of the service.
    pub(super) fn mean(&self) -> Option<f64> {
        self.pair().mean(self.service()?)
    }

    /// The rates of all services.
    pub(super) fn total_rates(&self) -> Option<Rates> {
        self.services.all().iter().filter_map(|row| row.rates).reduce(Rates::plus)
    }

    /// Seconds since the sample before.
    pub(super) fn sampled_every_s(&self) -> Option<f64> {
        let before = self.before.as_ref()?;
        Some(self.sample.at_ns.saturating_sub(before.at_ns) as f64 / 1e9)
    }

    /// The filter of the list that it applies to.
    pub(super) fn filter(&self) -> &str {
        match self.screen {
            Screen::Services => self.services.filter(),
            Screen::Service { .. } => self.clients.filter(),
        }
    }

    fn set_filter(&mut self, filter: &str) {
        match &mut self.screen {
            Screen::Services => self.services.set_filter(filter),
            Screen::Service { pane, .. } => {
                *pane = Pane::Clients;
                self.clients.set_filter(filter);
            }
        }
    }
}

// ---- keys ----

impl State {
    /// Performs the action of a key, and returns what remains to be done outside.
    pub fn act(&mut self, action: Action) -> Option<Effect> {
        self.message = None;
        match action {
            Action::Move(rows) => self.list().move_by(rows),
            Action::Page(pages) => {
                let rows = pages.saturating_mul(isize::try_from(self.page).unwrap_or(isize::MAX));
                self.list().move_by(rows);
            }
            Action::First => self.list().move_to(0),
            Action::Last => self.list().move_to(usize::MAX),
            Action::Sort => self.list().next_order(),
            Action::Reverse => self.list().reverse(),
            Action::Open => self.open_selected(),
            Action::Back => self.back(),
            Action::NextPane => self.next_pane(),
            Action::Filter => self.typing = true,
            Action::Type(c) => self.set_filter(&format!("{}{c}", self.filter())),
            Action::Erase => self.set_filter(&without_last(self.filter())),
            Action::Accept => self.typing = false,
            Action::DropFilter => {
                self.typing = false;
                self.set_filter("");
            }
            Action::UnpinClient => self.ask_about_client(),
            Action::UnpinService => self.ask_about_service(),
            Action::Yes => {
                if let Some(Overlay::Question(target)) = self.overlay.take() {
                    return Some(Effect::Unpin(target));
                }
            }
            Action::No | Action::CloseHelp => self.overlay = None,
            Action::Pause => self.paused = !self.paused,
            Action::Help => self.overlay = Some(Overlay::Help),
            Action::Quit => return Some(Effect::Quit),
        }
        None
    }

    /// The list with the cursor.
    fn list(&mut self) -> &mut dyn Cursor {
        match self.screen {
            Screen::Services => &mut self.services,
            Screen::Service { pane: Pane::Pods, .. } => &mut self.pods,
            Screen::Service { pane: Pane::Clients, .. } => &mut self.clients,
        }
    }

    /// Opens a service, or shows only the clients of a pod.
    fn open_selected(&mut self) {
        match self.screen {
            Screen::Services => {
                if let Some(id) = self.services.selected().map(|row| row.id) {
                    self.open_service(id);
                }
            }
            Screen::Service { pane: Pane::Pods, .. } => {
                if let Some(name) = self.pods.selected().map(|pod| pod.name.clone()) {
                    self.set_filter(&name);
                }
            }
            Screen::Service { pane: Pane::Clients, .. } => {}
        }
    }

    fn open_service(&mut self, id: u32) {
        self.screen = Screen::Service { id, pane: Pane::Pods };
        (self.pods, self.clients, self.found) = (List::default(), List::default(), None);
        self.set_pods();
    }

    fn back(&mut self) {
        if !self.filter().is_empty() {
            self.set_filter("");
        } else if self.screen != Screen::Services {
            self.screen = Screen::Services;
        }
    }

    fn next_pane(&mut self) {
        if let Screen::Service { pane, .. } = &mut self.screen {
            *pane = match pane {
                Pane::Pods => Pane::Clients,
                Pane::Clients => Pane::Pods,
            };
        }
    }

    fn ask_about_client(&mut self) {
        let Screen::Service { pane: Pane::Clients, .. } = self.screen else {
            return self.say("u unpins the selected client of a service, U all clients of the service", false);
        };
        let (Some(row), Some(service)) = (self.clients.selected(), self.service()) else { return };
        let (key, client, service) = (row.key, row.client_text(), service.name.clone());
        self.overlay = Some(Overlay::Question(Target::Client { key, client, service }));
    }

    fn ask_about_service(&mut self) {
        let id = match self.screen {
            Screen::Services => self.services.selected().map(|row| row.id),
            Screen::Service { id, .. } => Some(id),
        };
        let Some((id, service)) = id.and_then(|id| Some((id, self.sample.services.get(&id)?))) else { return };
        let (service, group) = (service.name.clone(), service.group.clone());
        self.overlay = Some(Overlay::Question(Target::Service { id, service, group }));
    }
}

fn without_last(text: &str) -> String {
    let mut text = text.to_owned();
    text.pop();
    text
}

/// The operations of keys on a list of any rows.
trait Cursor {
    fn move_by(&mut self, rows: isize);
    fn move_to(&mut self, position: usize);
    fn next_order(&mut self);
    fn reverse(&mut self);
}

impl<R: super::list::Row> Cursor for List<R> {
    fn move_by(&mut self, rows: isize) {
        Self::move_by(self, rows);
    }

    fn move_to(&mut self, position: usize) {
        Self::move_to(self, position);
    }

    fn next_order(&mut self) {
        Self::next_order(self);
    }

    fn reverse(&mut self) {
        Self::reverse(self);
    }
}
